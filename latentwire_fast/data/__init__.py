"""Examples from any source in one form: the testbed, SQuAD files, the hub."""
