"""Output directories: begin, commit and replace them; manifest, report and model card."""
