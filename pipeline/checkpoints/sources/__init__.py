"""From a location to a checkpoint directory: the Hub, GGUF files. The only modules with side effects on reading."""
