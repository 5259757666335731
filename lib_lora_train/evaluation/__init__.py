"""What the model makes of images and captions: losses on fixed noise, the verdict, scores, the caption check, class images."""
