"""Pictures and numbers from finished models: sampling, reranking, evaluation, reports."""
