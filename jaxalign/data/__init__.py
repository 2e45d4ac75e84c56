"""Rows in, token batches out: records, readers, chat templates, masks, packing."""
