"""Training of priors: objectives, image data, and one loop."""
