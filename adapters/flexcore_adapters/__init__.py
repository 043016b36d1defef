"""Built-in adapters, one module per modality: plug-ins like anybody's, none of which reaches into another."""
