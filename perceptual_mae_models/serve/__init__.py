"""The try-it page of `pmae serve`: `page` is its layout in gradio; everything else works without gradio."""
