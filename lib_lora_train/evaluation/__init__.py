"""What the model makes of images and captions: the caption check, class images, the loss on fixed noise."""
