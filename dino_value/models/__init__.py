"""The vision transformer: timm models behind one interface, blocks run in other ways, weights in and out."""
