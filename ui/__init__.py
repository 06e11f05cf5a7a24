"""What the person sees. The only place that imports gradio and plotly.

The page and its browser often share the processor with the model. OpenMP threads that spin while they
wait then starve both: with two busy cores decoding fell from 228 to 17 tokens/s (measured with the
embedded model). So waiting threads sleep, unless the environment says otherwise. It has to be said
before torch is loaded, hence here.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
