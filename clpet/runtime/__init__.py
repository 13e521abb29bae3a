"""What surrounds the computation: processes, hardware, signals, files that are written whole or not at all."""
