"""Reports on a trained model: the test report and the model card."""
