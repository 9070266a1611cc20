"""ptqc."""

from wrapt import register_post_import_hook

# transformers learns of our quantizer when it is imported, before or after; neither it nor torch is imported here.
register_post_import_hook("ptqc.hf:register", "transformers.quantizers.auto")
