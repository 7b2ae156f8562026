"""Evaluation methods: what a reader is given in the place of the text. `base.py` says how to write
one."""

PARTS = {
    "text": "latentwire_fast.evaluation.methods.text:Text",
    "latent": "latentwire_fast.evaluation.methods.latent:Latent",
    "latent_alone": "latentwire_fast.evaluation.methods.latent_alone:LatentAlone",
    "latent_hinted": "latentwire_fast.evaluation.methods.latent_hinted:LatentHinted",
    "token_budget": "latentwire_fast.evaluation.methods.token_budget:TokenBudget",
    "token_budget_question": (
        "latentwire_fast.evaluation.methods.token_budget_question:TokenBudgetQuestion"
    ),
    "byte_budget": "latentwire_fast.evaluation.methods.byte_budget:ByteBudget",
    "hybrid": "latentwire_fast.evaluation.methods.hybrid:Hybrid",
    "selective_context": "latentwire_fast.evaluation.methods.selective_context:SelectiveContext",
    "selective_context_bytes": (
        "latentwire_fast.evaluation.methods.selective_context_bytes:SelectiveContextBytes"
    ),
    "bm25_sentences": "latentwire_fast.evaluation.methods.bm25_sentences:BM25Sentences",
    "bm25_sentences_bytes": (
        "latentwire_fast.evaluation.methods.bm25_sentences_bytes:BM25SentencesBytes"
    ),
    "text_lora": "latentwire_fast.evaluation.methods.text_lora:TextLora",
    "closed_book": "latentwire_fast.evaluation.methods.closed_book:ClosedBook",
    "closed_book_lora": "latentwire_fast.evaluation.methods.closed_book_lora:ClosedBookLora",
    "shuffled_latent": "latentwire_fast.evaluation.methods.shuffled_latent:ShuffledLatent",
    "zero_latent": "latentwire_fast.evaluation.methods.zero_latent:ZeroLatent",
    "embedding_replay": "latentwire_fast.evaluation.methods.embedding_replay:EmbeddingReplay",
    "pca": "latentwire_fast.evaluation.methods.pca:PCA",
    "first_words": "latentwire_fast.evaluation.methods.first_words:FirstWords",
}
