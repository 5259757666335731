"""From a folder of images to examples, buckets and a plan; nothing here touches the model."""
