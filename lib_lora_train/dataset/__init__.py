"""From a folder of pictures to examples, buckets and a plan; nothing here touches the model."""
