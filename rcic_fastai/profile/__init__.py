"Embeddings: corrections, metrics, maps."
