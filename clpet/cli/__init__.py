"""The `clpet` command: subcommands, options, completion, and the start of processes."""
