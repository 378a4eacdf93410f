"""Zstd frames made once by libzstd 1.5, so that the conformance vectors do not depend on its version.

Levels -1, 1, 3, 19 and the parameters that spec/encodings/zstd.md names; every third frame has a content checksum.
"""

from __future__ import annotations

from base64 import b64decode

# The first 16 digits of the SHA-256 of a plane -> the plane as a frame.
FRAMES = {
    digest: b64decode(frame)
    for digest, frame in {
        "5395c51c67dcd8f3": (  # F64, 400 -> 159
            "KLUv/WCQAK0EALQDf39/f35/f35/fn9+fn5+f39+fn9/f39/fn9+fn5+f35/f35/f39+f35+fn9+fn5+fn9+fn5/fn5/fn8tIOCi"
            "svKQgIDMUSR4ALcZcgMHQHWwM8HnEDYJY93gGWeOD6A3+CaAp3sQtORSODwzGMxAUUAvwyEDGng4iEUQji1yxd0deLDICuIM+7VL"
            "PjjwI3iCC3AE"
        ),
        "5f10cdaf348c823d": (  # F64, 400 -> 295
            "KLUv/WCQAO0IAAZZRiSgKR0oWIImdhG8lXYl9S/iWiEWd62pL3yUL7hZwIC1D27ekgE8ADoAPQAMehhTNUR/8e7jgz/p8C0+qnxR"
            "fYzzpl1DtLa6hUEl6dHSiNnrOeErBOI6EhNpIM+XOAa03mDu+HeHyQ15dStLXLLRhSz31/wxI5cj2sYdHdsBK9DZoMSejGboGyTw"
            "Q2zLoh/sH8QGmBrFpLIjBJVaeYp67Wg/TtVInMPUZjdZfZL02xBjAuFrYqqpsbfGSMMJD4zZXBR7DxcxF1uAbA5Dao57+FQZtx2W"
            "U/RIC7kiNZh5AYtr/67BMwm+whVO9Mlre9JHbT0LtUhyHXVNCYlDqlTP8iYWakflPAwfIOH4ehvcnV07Y4g9fC/oucsqAA=="
        ),
        "700bbf42ac4cf45a": (  # F64, 400 -> 195
            "KLUv/WSQAK0FAPQDVaoAqqqqqgCqAFWqAACqVapVVVUAAFVVqlUAAABVAFVVAACqqlVVVaqqVapVqlWqVVUAAFWqVaoAqlVVVQBV"
            "TKhgTZJpDTACwhg8DxCwvAGtbuHt8ZZkTS8gPSkbT4DCgU3BAzGNcwxTjV4pLxsGuD1r4oi2zk3aBVV6DHeYWHlZD324MWHDXVun"
            "dizw8fBovA94i+sAg+G4BkJgMQBTmCF2eIOeA60Cyft8/BE18LHLDFKsP6KF"
        ),
        "27f0a6cc1aae52b3": (  # F64, 400 -> 246
            "KLUv/WCQAGUHADQHVasAq6urqwCrAFWrAKtVq1VVVQBVVVUAAAAAq1VVVaurVVVVVQAAAFUAAFUAqwAAq6urVasAVasAAKsAAFUA"
            "q6tVAKsAAKurq1VVqwAAq1WrAKtVVQAAq6sAVQAAVQCrqwAAqwBVq1VVVatVAKtVVVUAVTQgEBLF2PEB3JHdAfAGLXogjKAhDRaC"
            "QeI8kFqQcfRtAAWOXUh9LkoX4yAq4eDYgDsC5wYBBMAntEgDg7rZ4l7AdyD0NmwC0t3mxgQIsY8yBxq401oEcPALWF2sJ3BnDrQi"
            "FoA1j34uyIVdA2rZ+K7USjwZvC4d"
        ),
        "3e8ae50dcdee47a2": (  # F64, 400 -> 160
            "KLUv/WCQALUEACQDfn9/f35/f39/f35/f35+f39+f35+f35+fn9/fn5/fn5/f39+fn5+fn5/f35/f39/f38tIFCico4PTgk/NSQX"
            "5Bq2GfYZkgXMEygzyAQGM7wj4FDgmwG1YQMBzjaS3AEM3RVRgHKBfAKYAzp4IluOCDbcrTlj6AO3ChlPSBz7oGxkFpYSYAEZVgFy"
            "GuhmhwAMNd/gBQ=="
        ),
        "da7257bd4c73ceb6": (  # F64, 400 -> 286
            "KLUv/WSQAIUIAAYZQyKwJx2HXPAAGjSylAD0KxdmgSa7TMGTzzaEASQ6IJQqhaIUOAA8ADcAX5p7G+vUeSehAdD06eCHuuDzeeVt"
            "TYjh1oTaGZ/rTSc0QGW8kJWWl/am9E5q7T2KPs0bwOZXdQ+aEGqWkoWQXhO+Z5fViVL5KWJY7AzhfVUxIreP2qWhLTWQZc3HK9ky"
            "n2iNpwN9ASagTMdqbtJd0WDelQJOLOINqRZiPeUMvUH+4tKM+vvMqljzrBKLbqJ3KPPK0fvtzeINk0ADeIscN4sPKlZzd9l+S8Q0"
            "av0UfY3TsvMXBO44iaY8fBazq4H3T4yw/RTNNaaduZ0s5Ph69RXAXktnTWX5XsOoGEiTDDmV3pkAfx8Lig=="
        ),
        "133249de42da4e84": (  # F64, 400 -> 149
            "KLUv/WCQAF0EAAKEBQfwOX+9d0YGPVjQrUBhxRdanSIG1wFJqAHn2WczIAKjlFMPEKC7cBbyTgV8QLjTxyfsJvtEKIlcyRcQDEot"
            "iuHBNggCrRGRmgWh2RIIvkDM0v/Dc1vUt1UkBUgJmwfPtONKypQ2kJvC/x0lQcd8M0Bd655QcyZXxaKw783fZQUsy7kNanVwqQI="
        ),
        "d7fda6709810b536": (  # F64, 400 -> 256
            "KLUv/WCQALUHADQIVVWrq1VVAACrVQCrAKurAFVVVaurAFWrq6tVqwAAVatVVVUAq6sAVQBVAFUAAKurq6tVVVVVAABVVVVVqwAA"
            "VasAqwCrVQBVq6sAVQBVVasAVQCrVVWrq6sAAFUAAKsAVVWrAFUAAKsAAABVq1VVVatVAKtVVVUAAKurAAAAq1VVVasxICACYhhT"
            "H1KRzgNAGu4gw+6CTwOdcoRPEkDHrxZvyqU7/UgLDAi/QZkA3eCVY1S0WWFXsPwN0AS63rwNRHKELbe6AXHI54fFGyYxKzGgoCP8"
            "aVhtauK+moEAdGC1nYnDFQJHDATOcaxjvwBMK1+4Tw=="
        ),
        "a2e51e104a803d36": (  # F64, 200 -> 86
            "KLUv/SDIbQIAFAJ/f39/fn9/f35+f35/fn5+f35+f35+f39/f39/f39+f38SACgCdMjgar8k5JCVgZCEKPABG2pmyAlIApmsyOHM"
            "DAYDMoC4u4xLFCQ="
        ),
        "f6b076fadce8bd45": (  # F64, 200 -> 62
            "KLUv/SDIrQEAgkwMBuAPEGKwFAVULIGLigAEymgF0ToJQkmYJhwvOhFFuQJtCOoK6rTrlFeFxZcLorTUDgA="
        ),
        "8c4a5e193afdfea5": (  # F64, 200 -> 135
            "KLUv/SDI9QMARAOrq1WrVVUAAKtVAFUAAFVVq6urq6sAAKtVVQCrq6tVVQBVAKsAAKsAAKurVVUAVQAAAFVVHwA0B3riDrxQoeGG"
            "LYayINQA6wKFodEJMODApUK05G3KME/DpSxnHatCYKnGqrrBc8CruJvBUgVzIfYSiTPCzdAvMWaGT1CM"
        ),
        "3ed1a7dd8970d703": (  # F32, 400 -> 314
            "KLUv/WSQAGUJADQNq9UAVVWrVVUAq1UAVatVgFVVAFWAAFWrq6urVVVVAFVVKwCrAFVVVasAq6sAAFWrq1WrAKsrqwBVAKvVVVWr"
            "VVWA1VVVqwCrVasAAKsrVQCrAKurVatVAFUAgACrq1UAgACrVQCrVYAAAIDVq6sAAKuAAFWrgAArVdWrVaurq4BVqwCAKwBVAKsA"
            "1QCrKwAAVasAVQArAAAAAKsr1dVVqwCrVYDVq6tVAKsAAFWrgFWrAIBVVVWrAFWAVVWrq6vVq1UAVVUAKysAAABVqwAAVVWrACMA"
            "XQXkcIHXwdE2GBBudw2AClTsncQ0TioWZt1RNULIBqR2t2Np59YwFWS8Do9obB4C/Gy0MVISTIM7IVSmYO4uvg02iAe3FB0Cxo0R"
            "GriJj+e4PMOEAmUBxZM="
        ),
        "c8c789f1917fd0c8": (  # text, 480 -> 64
            "KLUv/WDgALUBAIQCdGhlIHNhbWUgd29yZHMsIGFnYWluIGFuZDsgbiBlbmQgb2YgaXRzIAMAu0sAqkQpXLEyBg=="
        ),
        "b7656984e43402d8": (  # I32, 256 -> 36
            "KLUv/WAAANUAAID///8AAAAAAAD/AAAAAAD/AgBYpCgBvlkH"
        ),
        "71bf070051d11d63": (  # I32, 256 -> 60
            "KLUv/WQAAHUBAFQC9/j7AAcQGwMS/hEBGAwC+hkVExMVGfoCDBgBEf4SAxsQBwD7+AEAxSJKPQEWnduj"
        ),
        "33f7f206bd733d13": (  # segments, 700 -> 192
            "KLUv/WS8AZUFAELECRTAJcMB/+8c/////wcVY9oDpz2ZAn8GSkQfP/WEFQWt0daHr7RuB02oMFOSxnACmTqrBxGAIMXAs2y1dsNKhWTR"
            "F+QLSk1I8QkRbzjZbTuVJExHatNbB4CdclTuZozjkneHtqFuwqtK76PSMbQJHdtgg5WroIrRSMjmhhu9pOEERmLMb7EPMqmcFt2CNbJ+"
            "YBhAURoumKocNyT0TX1wkrII+B0j3Cp2h+h7jkjpcjZR+xy7"
        ),
        "0f6c267a67edac6d": (  # segments, 700 -> 30
            "KLUv/WC8AaUAACgAdQB/AAQAOlNcaqh6J4CKgAI2"
        ),
        "81965049ac408ee3": (  # segments, 150 -> 123
            "KLUv/SCWlQMAYokbI6A1aQz/YA1jsyX+HLKKr3I1of//sW9oLxw/kiGvFNZFIm0KjqG2XwY947qdHI3vMjU1CuPSC4v9w8uymmBPKHL0"
            "v8cjDg7Pn+TnYx5wgQFOxXUrM+Jf6LLz7Vr8Iqg1Xz+Sv6Qc7ls6soiHbAcA"
        ),
        "24bfb9363d00cf4b": (  # segments, 600 -> 51
            "KLUv/WBYAU0BAMAAAGQAFACZAAEAmQBjAGMAmABkAJgA/wAMUAIARp6gHk6JRkYD1tMI"
        ),
        "e2012aaaea898db4": (  # segments, 600 -> 42
            "KLUv/WRYAeUAADAAADoAOj8HAINIIDmkmikApLDikIIEUixTgAU6LZUd"
        ),
        "e0123d3b9b06ccc1": (  # segments, 88 -> 69
            "KLUv/SBY5QEAggUOE8CnNdmz9f+zxK1VRzxWKpdu7xR1zygT2Q0StQGOxyyl7c+h6OylOsVjctNoS+GRYfomqmWVqhcA"
        ),
        "083d46768f0460f1": (  # segments, 700 -> 183
            "KLUv/WC8AW0FALKFCQ2gN8MBFd4TAGZLtkwBr0jyetbcwapyR130gENb41OlTWfb2woHRyAQA5mqOkBAM3Qc0AwOKlaVJNAJ8TpbM8lg"
            "eAA0eBdICrBxNqx8bwxlKLn1LShuedwXxe5RS3ACNI5kmIYYBb6Q3XeExiVn1mwdzBCL4BbloSs+IkgfCBl4DUZiQkNEBvgyJBuIpgfQ"
            "0LB2rQ+toFK+aGdNK9vbyAuT6DoglQHLZAhY"
        ),
        "42e45429c2c8778e": (  # segments, 600 -> 67
            "KLUv/WRYAa0BAGgAABQAGAABABwAARQAEABgE0EE4DigQyGYAPM9WjCADIEomGAQgAvkjAkUoPjgxACEcYAFKiFloA=="
        ),
        "b7519597b32dfb8f": (  # segments, 88 -> 76
            "KLUv/SBYHQIAgsUPF8BrDu9/263ooh515J4/Sps2NusXMrJTwasUxqeD3NSsRLwuYhv098bOMi0acTadNVkK4LvCdJn9aNXwaqwdAA=="
        ),
        "95785ca46e8f8083": (  # segments, 700 -> 158
            "KLUv/WC8AaUEAFIECA/QZTgAlPUAAABcANPIlinVwu9vq7pTJFeyFpxje/sDPiAgA5kpbjic9qEy2H1RhrjM039DZUjgnmTWNrBiuU3L"
            "THtkNMTrYvhsy8Fu8N4h1vDAncaikMPL7pl05NzQLIoDoAEZrgjNAAMalSMkwV0RMOC+jPJd6AieAiWuadbmHGPzYIADpFyMLQzGCNvY"
            "hpU="
        ),
        "a4292966ffb0d2b8": (  # segments, 700 -> 29
            "KLUv/WC8AZ0AAEAAAH8AdQB1AARQAgBt6oOKOAE="
        ),
        "dd0d9279f58c2660": (  # segments, 150 -> 117
            "KLUv/SSWRQMAEgkYHKAZ0hqreARww40KGoDYIe1ozrF8ZO+Lb5F4yxT3X0LdKY3A5kDq56DKGopQdeXsMRb0MXdhTcQWE+miQF87gLIc"
            "DbVePTkqQuLmvEbSYENFG4FpJiWGYyEGAsgCu/NDAQAC4AKA3wXn"
        ),
        "fff68793306da97d": (  # segments, 600 -> 58
            "KLUv/WBYAYUBAOIBBQrwOf9Odz2JtCZT547/p//HvONxCQAMQOEDUnwO5as8iXchnKsoAAcHj36ADQ=="
        ),
        "664201aa09e68981": (  # segments, 600 -> 35
            "KLUv/WBYAc0AAGAAAD8APwA6AD8APwAGUAIAeGpA/Qx5Ugo="
        ),
    }.items()
}
