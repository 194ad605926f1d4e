"""LLM-as-a-Judge: prompt templates, score parsing, choice of the pair, agreement with humans."""
