"""HPE-CogVLM: a vision language model that reads head pose."""
