"""From a photo's file to pixels: preprocessing, augmentation, files inside tars."""
