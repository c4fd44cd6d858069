"""kshot's own learners and backbones, each found through the entry points that anyone's would be found through."""
