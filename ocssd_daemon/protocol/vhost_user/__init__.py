"""vhost-user without I/O: wire layouts, typed messages and the session state machine of a block back end."""
