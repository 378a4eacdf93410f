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
    }.items()
}
