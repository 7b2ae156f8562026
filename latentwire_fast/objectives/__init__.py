"""What is learned: the losses of a training stage."""
