"""featurex-ray: archives of images and videos into feature tables."""
