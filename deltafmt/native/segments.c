/* Filter `segments` (spec/encodings/segments.md): elements to planes and back, all segments of a chunk at once. */

#include "native.h"

enum { FINE, BITS_LEFT_OVER, TOO_LARGE }; /* as in native/planes.py */

#define TYPE uint8_t
#define NAME(name) name##_1
#include "planes_of_segments.h"
#undef TYPE
#undef NAME

#define TYPE uint16_t
#define NAME(name) name##_2
#include "planes_of_segments.h"
#undef TYPE
#undef NAME

#define TYPE uint32_t
#define NAME(name) name##_4
#include "planes_of_segments.h"
#undef TYPE
#undef NAME

#define TYPE uint64_t
#define NAME(name) name##_8
#include "planes_of_segments.h"
