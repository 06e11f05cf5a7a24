# The page on port 7860, as an unprivileged user. `docker run --gpus all` uses the GPU; without one it runs on
# the CPU with the embedded model.
FROM python:3.11-slim

# Triton compiles its launcher with the system's C compiler when it first meets a GPU. The CPU kernels need nothing.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 kvlens
USER kvlens
WORKDIR /home/kvlens/app
ENV PATH=/home/kvlens/.local/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NUMBA_CACHE_DIR=/home/kvlens/.cache/numba \
    GRADIO_ANALYTICS_ENABLED=False

# For the small CPU build of torch, pass PyTorch's CPU index: --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_EXTRA_INDEX_URL=
COPY --chown=kvlens requirements.txt .
RUN pip install --user --no-cache-dir -r requirements.txt

COPY --chown=kvlens . .
EXPOSE 7860
CMD ["python", "app.py", "--host", "0.0.0.0", "--port", "7860"]
