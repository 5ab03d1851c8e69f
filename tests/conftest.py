"""What holds for every test: a property has no time limit of its own, because other work shares the machine."""

from hypothesis import settings

settings.register_profile("ocssd", deadline=None, print_blob=True)
settings.load_profile("ocssd")
