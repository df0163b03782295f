"""Other people's file formats and tensor names: Hugging Face and PEFT. The only place that knows them."""
