"""From files to batches of uint8 images, in an order and with draws that the seed alone decides."""
