/* Keys of JSON (deltafmt/strictjson.py): of a manifest most of the time went into asking Python whether one is there
   twice. */

#include "native.h"

#define DEPTH 64 /* as JSON_DEPTH in limits.py */

#define FEW 8 /* keys of an object that are compared with each other, in whatever order: entries of a header */

typedef struct {
    const uint8_t *text;
    int64_t size;
} Key;

typedef struct {
    Key greatest, first[FEW];
    int64_t keys;
} Object;

INLINE int order_of(Key one, Key other) {
    const int order = memcmp(one.text, other.text, (size_t)(one.size < other.size ? one.size : other.size));
    return order ? order : (one.size > other.size) - (one.size < other.size);
}

/* Notes a key of an object; 0 if it is there, or may be. */
INLINE int is_new(Key key, Object *object) {
    const int rises = !object->keys || order_of(key, object->greatest) > 0;
    if (!rises) {
        if (object->keys > FEW) return 0;
        for (int64_t i = 0; i < object->keys; i++)
            if (!order_of(key, object->first[i])) return 0;
    }
    if (rises) object->greatest = key;
    if (object->keys < FEW) object->first[object->keys] = key;
    object->keys++;
    return 1;
}

/* Whether in `text`, if it is JSON, no object has a key twice, as far as that is told without a table of them: keys have
   to rise, but for objects of few. Says no to what may be JSON and is not printed canonically: white space, which may
   stand before a colon; and an escape, which is not the byte it means. Nesting deeper than a manifest's is not looked
   into. */
EXPORT int keys_differ(const uint8_t *text, int64_t size) {
    Object open[DEPTH + 1];
    int depth = 0;
    open[0].keys = 0;
    for (int64_t i = 0; i < size; i++) {
        const uint8_t found = text[i];
        if (found == '{' || found == '[') {
            if (++depth > DEPTH) return 0;
            open[depth].keys = 0;
        } else if (found == '}' || found == ']') {
            if (--depth < 0) return 0;
        } else if (found == '"') {
            Key key = {text + ++i, 0};
            for (; i < size && text[i] != '"'; i++)
                if (text[i] == '\\') return 0;
            key.size = text + i - key.text;
            if (i + 1 < size && text[i + 1] == ':' && !is_new(key, &open[depth])) return 0;
        } else if (found <= ' ') return 0;
    }
    return 1;
}
