"""The host flash translation layer that makes a plain disk of the flash."""
