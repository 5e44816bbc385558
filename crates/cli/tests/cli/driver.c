// A driver of CUDA without devices behind it: enough of it to open them, as the environment says.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int number(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value ? atoi(value) : otherwise;
}

static _Thread_local void *current;

int cuDriverGetVersion(int *version) { return *version = number("FAKE_VERSION", 13000), 0; }
int cuInit(unsigned flags) { return (void)flags, number("FAKE_INIT", 0); }
int cuDeviceGetCount(int *count) { return *count = number("FAKE_COUNT", 1), 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
int cuDeviceGetName(char *name, int length, int device) { return snprintf(name, length, "Fake %d", device), 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { return (void)device, *bytes = 1 << 30, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)(device + 1L), 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return (void)device, 0; }
int cuCtxGetCurrent(void **context) { return *context = current, 0; }
int cuCtxSetCurrent(void *context) { return current = context, 0; }
int cuCtxSynchronize(void) { return 0; }
int cuStreamCreate(void **stream, unsigned flags) { return (void)flags, *stream = (void *)8L, 0; }
int cuStreamDestroy_v2(void *stream) { return (void)stream, 0; }
int cuMemAlloc_v2(void **address, size_t bytes) { return (void)address, (void)bytes, number("FAKE_ALLOCATION", 2); }
int cuMemGetInfo_v2(size_t *unused, size_t *total) { return *unused = 12345, *total = 1 << 30, 0; }

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    // compute capability, major and minor
    *value = attribute == 75 ? number("FAKE_CAPABILITY", 9) : attribute == 76 ? 0 : 1 << 16;
    return 0;
}

static int text(int code, const char **text) {
    static char unknown[32];
    snprintf(unknown, sizeof unknown, "code %d", code);
    return *text = unknown, 0;
}
int cuGetErrorName(int code, const char **name) { return text(code, name); }
int cuGetErrorString(int code, const char **string) { return text(code, string); }
