"""What a conversion kept and what it lost: text, copying, retrieval, tasks, and the linear part."""
