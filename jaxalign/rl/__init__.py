"""Learning from answers that the model samples itself: rewards, and the methods that raise them."""
