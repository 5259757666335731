"""What the model makes of images and captions: the caption check and class images."""
