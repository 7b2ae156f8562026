"""An encoder's hidden states to M latents. One line per pooler: its name, and where it is."""

PARTS = {
    "queries": "latentwire_fast.models.poolers.queries:QueriesPooler",
    "spans": "latentwire_fast.models.poolers.spans:SpansPooler",
    "cross_attention": "latentwire_fast.models.poolers.cross_attention:CrossAttentionPooler",
    "layer_spans": "latentwire_fast.models.poolers.layer_spans:LayerSpansPooler",
    "selected": "latentwire_fast.models.poolers.selected:SelectedPooler",
    "mean": "latentwire_fast.models.poolers.mean:MeanPooler",
    "hierarchical": "latentwire_fast.models.poolers.hierarchical:HierarchicalPooler",
    "convolution": "latentwire_fast.models.poolers.convolution:ConvolutionPooler",
    "gated_queries": "latentwire_fast.models.poolers.gated_queries:GatedQueriesPooler",
    "pool_expand": "latentwire_fast.models.poolers.pool_expand:PoolExpandPooler",
    "refiner": "latentwire_fast.models.poolers.refiner:RefinerPooler",
}
