"""The subcommands, a file a family: what each takes, and what it does; heavy imports wait until they are needed."""
