/* Keys of JSON (deltafmt/strictjson.py): of a manifest most of the time went into asking Python whether one is there
   twice. */

#include "native.h"

#define DEPTH 64 /* as JSON_DEPTH in limits.py */

typedef struct {
    const uint8_t *text; /* none yet, if NULL */
    int64_t size;
} Key;

INLINE int is_after(Key key, Key last) {
    const int order = last.text ? memcmp(key.text, last.text, (size_t)(key.size < last.size ? key.size : last.size)) : 1;
    return order ? order > 0 : key.size > last.size;
}

/* Whether in `text`, if it is JSON, each object has its keys in rising order, and none twice. Says no to what may be
   JSON and is not printed canonically: white space, which may stand before a colon; and an escape, which is not the
   byte it means. Nesting deeper than a manifest's is not looked into. */
EXPORT int keys_rise(const uint8_t *text, int64_t size) {
    Key last[DEPTH + 1] = {{NULL, 0}};
    int depth = 0;
    for (int64_t i = 0; i < size; i++) {
        const uint8_t found = text[i];
        if (found == '{' || found == '[') {
            if (++depth > DEPTH) return 0;
            last[depth].text = NULL;
        } else if (found == '}' || found == ']') {
            if (--depth < 0) return 0;
        } else if (found == '"') {
            Key key = {text + ++i, 0};
            for (; i < size && text[i] != '"'; i++)
                if (text[i] == '\\') return 0;
            key.size = text + i - key.text;
            if (i + 1 < size && text[i + 1] == ':') {
                if (!is_after(key, last[depth])) return 0;
                last[depth] = key;
            }
        } else if (found <= ' ') return 0;
    }
    return 1;
}
