"""Networks that judge pictures: the perceptual loss, the patch discriminator, Inception and FID.

Start: perceptual.py and discriminator.py: losses of the dVAE; inception.py and fid.py: scores.
Imports: models, core.
"""
