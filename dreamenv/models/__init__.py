"""Networks: what they are made of (`interface`), how they are found (`registry`), read and written (`io`)."""
