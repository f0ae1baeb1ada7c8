"""What to cite, for each part that something was made of."""

MME_SID = """@inproceedings{wang2025mmesid,
  title={Empowering Large Language Model for Sequential Recommendation via Multimodal Embeddings and Semantic IDs},
  author={Yuhao Wang and Junwei Pan and Xinhang Li and Maolin Wang and Yuan Wang and Yue Liu and Dapeng Liu and Jie Jiang and Xiangyu Zhao},
  booktitle={Proceedings of the 34th ACM International Conference on Information and Knowledge Management},
  year={2025},
  note={arXiv:2509.02017}
}"""  # noqa: E501
SASREC = """@inproceedings{kang2018sasrec,
  title={Self-Attentive Sequential Recommendation},
  author={Wang-Cheng Kang and Julian McAuley},
  booktitle={IEEE International Conference on Data Mining},
  year={2018},
  note={arXiv:1808.09781}
}"""
RQ_VAE = """@inproceedings{rajput2023tiger,
  title={Recommender Systems with Generative Retrieval},
  author={Shashank Rajput and Nikhil Mehta and Anima Singh and others},
  booktitle={Advances in Neural Information Processing Systems},
  year={2023},
  note={arXiv:2305.05065}
}"""
CLIP = """@inproceedings{radford2021clip,
  title={Learning Transferable Visual Models From Natural Language Supervision},
  author={Alec Radford and Jong Wook Kim and Chris Hallacy and others},
  booktitle={International Conference on Machine Learning},
  year={2021},
  note={arXiv:2103.00020}
}"""
SIGLIP = """@inproceedings{zhai2023siglip,
  title={Sigmoid Loss for Language Image Pre-Training},
  author={Xiaohua Zhai and Basil Mustafa and Alexander Kolesnikov and Lucas Beyer},
  booktitle={IEEE/CVF International Conference on Computer Vision},
  year={2023},
  note={arXiv:2303.15343}
}"""
LLM2CLIP = """@misc{huang2024llm2clip,
  title={LLM2CLIP: Powerful Language Model Unlocks Richer Visual Representation},
  author={Weiquan Huang and Aoqi Wu and Yifan Yang and others},
  year={2024},
  note={arXiv:2411.04997}
}"""
SENTENCE_BERT = """@inproceedings{reimers2019sentence,
  title={Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks},
  author={Nils Reimers and Iryna Gurevych},
  booktitle={Conference on Empirical Methods in Natural Language Processing},
  year={2019},
  note={arXiv:1908.10084}
}"""
MINILM = """@inproceedings{wang2020minilm,
  title={MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers},
  author={Wenhui Wang and Furu Wei and Li Dong and Hangbo Bao and Nan Yang and Ming Zhou},
  booktitle={Advances in Neural Information Processing Systems},
  year={2020},
  note={arXiv:2002.10957}
}"""
LORA = """@inproceedings{hu2022lora,
  title={LoRA: Low-Rank Adaptation of Large Language Models},
  author={Edward J. Hu and Yelong Shen and Phillip Wallis and others},
  booktitle={International Conference on Learning Representations},
  year={2022},
  note={arXiv:2106.09685}
}"""
QLORA = """@inproceedings{dettmers2023qlora,
  title={QLoRA: Efficient Finetuning of Quantized LLMs},
  author={Tim Dettmers and Artidoro Pagnoni and Ari Holtzman and Luke Zettlemoyer},
  booktitle={Advances in Neural Information Processing Systems},
  year={2023},
  note={arXiv:2305.14314}
}"""


def citations(kind: str, encoders: dict[str, dict], adapter: str | None = None) -> dict[str, str]:
    """
    BibTeX by what it describes, for the parts that a result was made of.

    Args:
        kind (`str`): The result's kind, see [`SUBJECTS`].
        encoders (`dict[str, dict]`): By modality what made the embeddings: `kind` and `name`.
        adapter (`str`, *optional*): `"lora"` or `"qlora"`, if the decoder has one.
    """
    names = {f"{one.get('kind')} {one.get('name')}".lower() for one in encoders.values()}
    found = {"the method": MME_SID} if kind != "encoder" else {}
    if kind == "sasrec" or any(name.startswith("sasrec ") for name in names):
        found["SASRec"] = SASREC
    if kind in ("quantizer", "recommender") and encoders:
        found["TIGER (semantic IDs by residual quantization)"] = RQ_VAE
    for word, what, entry in (
        ("sentence ", "Sentence-BERT", SENTENCE_BERT),
        ("minilm", "MiniLM", MINILM),
        ("llm2clip", "LLM2CLIP", LLM2CLIP),
        ("siglip", "SigLIP", SIGLIP),
        ("clip", "CLIP", CLIP),
    ):
        if any(word in name for name in names) and not (word == "clip" and {"SigLIP", "LLM2CLIP"} & found.keys()):
            found[what] = entry
    # One that was trained on these items alone is a CLIP, whatever its folder is called.
    is_dual = kind == "encoder" or any(name.startswith("dual_encoder ") for name in names)
    if is_dual and not {"SigLIP", "LLM2CLIP"} & found.keys():
        found.setdefault("CLIP", CLIP)
    if adapter is not None:
        found["LoRA"] = LORA
        if adapter == "qlora":
            found["QLoRA"] = QLORA
    return found
