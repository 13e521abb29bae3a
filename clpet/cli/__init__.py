"""What a shell calls: commands, options, completion and the start of processes."""
