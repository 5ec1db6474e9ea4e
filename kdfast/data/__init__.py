"""From image files to fastai DataLoaders: data sets, decoding, splits, views. Nothing here knows of networks or teachers."""
