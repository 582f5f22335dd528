# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # Finding the help page that answers a question
#
# Sentences with a like meaning have vectors with a like direction. A list of frequent questions is embedded once; a
# customer's question is compared with all of them.

# %%
import numpy as np

import tinybert_jax as tj

MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # a folder, or a name on the hub

FAQ = {
    "How do I reset my password?": "Choose 'Forgot password' on the sign-in page.",
    "Where can I see my invoices?": "Under Account, Billing.",
    "How do I cancel my subscription?": "Under Account, Plan, at the bottom of the page.",
    "Which payment methods do you accept?": "Cards, bank transfer and PayPal.",
    "How long does delivery take?": "Two to four working days.",
    "Can I change the delivery address?": "Until the parcel has left our house.",
    "What do I do with a broken item?": "Send us a picture; we replace it.",
    "Do you ship to other countries?": "To all countries of Europe.",
}

# %%
embed = tj.pipeline("sentence-similarity", MODEL)
pages = embed(list(FAQ))


def find(question, num_pages=2):
    vector = embed(question)
    cosines = pages @ vector / np.linalg.norm(pages, axis=1) / np.linalg.norm(vector)
    return [(list(FAQ)[place], float(cosines[place])) for place in np.argsort(-cosines)[:num_pages]]


for question in (
    "my parcel went to the old house",
    "I can't log in any more",
    "I want my money back",
):
    print(question)
    for page, cosine in find(question):
        print(f"    {cosine:.2f}  {page}  {FAQ[page]}")

# %% [markdown]
# From the command line, with an index that is kept for the next question:
#
# ```bash
# tinybert search MODEL faq.csv --text question --label answer -q "I can't log in any more" --index faq-index
# ```
#
# `configs/distill/embeddings.yaml` distils a smaller model of such vectors without any labels.
