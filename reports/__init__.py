"""What a trained model says of itself: the test report and the model card."""
