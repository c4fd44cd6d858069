"""Images to episodes: data sets, importers, episodes, augmentation, and the embedding store."""
