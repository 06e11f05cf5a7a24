"""What the person sees. The only place that imports gradio and plotly."""
