"""Programs beside the plugin: what pruning keeps of an image, and a checkpoint to try it with."""
