// Marks functions that host compilers and nvcc compile alike.
#pragma once

#if defined(__CUDACC__)
#define JAX_EP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define JAX_EP_HOST_DEVICE inline
#endif
