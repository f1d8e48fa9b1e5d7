"""What train.py needs besides the method: checkpoints, the log, several processes, and so on."""
